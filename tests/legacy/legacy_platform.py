"""The platform's old tables as they really are, of any size: made by the server, from one seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    import psycopg

__all__ = ["REAL", "World", "build"]


@attrs.frozen(kw_only=True)
class World:
    """How much there is of everything."""

    investors: int = 202
    deals: int = 29
    companies: int = 98
    primary: int = 301
    subnominee: int = 53
    secondary: int = 14
    years: int = 7
    lived: bool = True
    """Whether every primary transaction was completed after it was made, by an UPDATE that the sync triggers copied."""


REAL = World()

# What the old tables hold beyond the clean columns; the second half is empty in every row.
EXTRAS = """
  nominee boolean,
  term_sheet text,
  closing_agreement text,
  transfer_due numeric,
  initial_amount_received numeric(18,2),
  structuring_fee_discount_percent numeric,
  premium_fee_discount_percent numeric,
  management_fee_discount_percent numeric,
  performance_fee_discount_percent numeric,
  buyer_investor_id integer,
  seller_investor_id integer,
  created_by uuid,
  updated_by uuid,
  notes text,
  nominee_investor_id integer,
  secondary_transaction_date date,
  purchase_price numeric,
  fee_calc_notes text
"""

DEFINITIONS = f"""
CREATE SCHEMA core;

CREATE TABLE public."companies.company" (
  company_id serial PRIMARY KEY,
  company_name text NOT NULL,
  company_type text,
  company_sector text,
  country_incorporation text,
  company_website text,
  funding_round_stage text,
  founding_year integer,
  latest_valuation_mil numeric,
  created_at timestamptz DEFAULT now(),
  updated_at timestamptz DEFAULT now()
);
CREATE TABLE core.companies (LIKE public."companies.company" INCLUDING ALL);

CREATE TABLE public."deals.deal" (
  deal_id serial PRIMARY KEY,
  deal_code text,
  deal_name text NOT NULL,
  deal_type text,
  deal_category text,
  deal_status text,
  underlying_company_id integer REFERENCES public."companies.company",
  partner_company_id integer,
  holding_entity integer,
  deal_date date,
  closing_date date,
  exit_date date,
  initial_unit_price numeric,
  gross_capital numeric,
  initial_net_capital numeric,
  deal_currency text,
  structuring_fee_percent numeric,
  premium_fee_percent numeric,
  management_fee_percent numeric,
  performance_fee_percent numeric,
  created_at timestamptz DEFAULT now(),
  updated_at timestamptz DEFAULT now()
);
CREATE TABLE core.deals (LIKE public."deals.deal" INCLUDING ALL);

CREATE TABLE public."investors.investor" (
  id integer UNIQUE,
  investor_id serial PRIMARY KEY,
  full_name text NOT NULL,
  primary_email text,
  investor_type text,
  investor_status text,
  kyc_status text,
  nationality text,
  country_of_residence text,
  phone text,
  join_date date,
  created_at timestamptz DEFAULT now(),
  updated_at timestamptz DEFAULT now()
);
CREATE TABLE core.investors (LIKE public."investors.investor" INCLUDING ALL);

CREATE TABLE public."transactions.transaction.primary" (
  transaction_id serial PRIMARY KEY,
  deal_id integer NOT NULL REFERENCES public."deals.deal",
  investor_id integer NOT NULL REFERENCES public."investors.investor",
  transaction_date date,
  status text,
  units numeric,
  unit_price numeric,
  gross_capital numeric(18,2),
  net_capital numeric(18,2),
  amount numeric(18,2),
  currency text,
  admin_fee numeric,
  management_fee_percent numeric,
  performance_fee_percent numeric,
  structuring_fee_percent numeric,
  premium_fee_percent numeric,
  parent_transaction_id integer,
  {EXTRAS},
  created_at timestamptz DEFAULT now(),
  updated_at timestamptz DEFAULT now()
);
CREATE TABLE public.transactions (LIKE public."transactions.transaction.primary" INCLUDING ALL);
ALTER TABLE public.transactions ADD COLUMN transaction_type text NOT NULL DEFAULT 'primary';
CREATE TABLE core.transactions (LIKE public.transactions INCLUDING ALL);

CREATE TABLE public."transactions.transaction.subnominee" (
  subnominee_id serial PRIMARY KEY,
  sub_nominee_investor_link text,
  transaction integer REFERENCES public."transactions.transaction.primary",
  gross_capital_nominee numeric(18,2),
  initial_net_capital_nominee numeric(18,2),
  subnominee_share_of_ticket numeric,
  gross_capital_subnominee numeric(18,2),
  created_at timestamptz DEFAULT now(),
  updated_at timestamptz DEFAULT now()
);
CREATE TABLE public."transactions.transaction.secondary" (
  id serial PRIMARY KEY,
  deal_name_link text,
  seller_name text,
  buyer_name text,
  subnominee_seller boolean,
  transaction integer REFERENCES public."transactions.transaction.primary",
  unit_price numeric,
  number_of_unit_sold numeric,
  initial_net_capital numeric(18,2),
  price_per_unit_sold numeric,
  secondary_transaction_date date,
  created_at timestamptz DEFAULT now(),
  updated_at timestamptz DEFAULT now()
);
CREATE TABLE public."transactions.transaction.advisory" (
  id serial PRIMARY KEY,
  advisory_deal text,
  deal_link text,
  holding_entity text,
  number_of_shares numeric,
  granted_share_price numeric,
  advisory_cash_revenue numeric,
  transaction_date date
);
"""

INDEXES = """
CREATE INDEX ON public."transactions.transaction.primary" (deal_id);
CREATE INDEX ON public."transactions.transaction.primary" (investor_id);
CREATE INDEX idx_transactions_clean_deal ON public.transactions (deal_id);
CREATE INDEX idx_transactions_clean_investor ON public.transactions (investor_id);
CREATE INDEX idx_transactions_deal_id ON public.transactions (deal_id);
CREATE INDEX idx_transactions_investor_id ON public.transactions (investor_id);
CREATE INDEX ON public.transactions (transaction_date);
CREATE INDEX ON public.transactions (transaction_type);
CREATE INDEX ON public.transactions (status);
CREATE INDEX idx_core_transactions_deal ON core.transactions (deal_id);
CREATE INDEX idx_core_transactions_investor ON core.transactions (investor_id);
CREATE INDEX ON core.transactions (transaction_date);
CREATE INDEX ON core.transactions (transaction_type);
CREATE INDEX ON core.transactions (status);
CREATE INDEX ON public."transactions.transaction.subnominee" (transaction);
CREATE INDEX ON public."transactions.transaction.secondary" (transaction);
"""

COLUMNS = (
    "transaction_id, deal_id, investor_id, transaction_date, status, units, unit_price, gross_capital, net_capital,"
    " amount, currency, admin_fee, management_fee_percent, performance_fee_percent, structuring_fee_percent,"
    " premium_fee_percent, nominee, term_sheet, closing_agreement, transfer_due, initial_amount_received,"
    " structuring_fee_discount_percent, premium_fee_discount_percent, management_fee_discount_percent,"
    " performance_fee_discount_percent, created_at, updated_at"
)

TRIGGERS = f"""
CREATE FUNCTION public.sync_transaction_to_new() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'INSERT' THEN
    INSERT INTO public.transactions ({COLUMNS}) SELECT {", ".join(f"NEW.{c.strip()}" for c in COLUMNS.split(","))};
    INSERT INTO core.transactions ({COLUMNS}) SELECT {", ".join(f"NEW.{c.strip()}" for c in COLUMNS.split(","))};
  ELSE
    UPDATE public.transactions AS t SET status = NEW.status, updated_at = NEW.updated_at
    WHERE t.transaction_id = NEW.transaction_id;
    UPDATE core.transactions AS t SET status = NEW.status, updated_at = NEW.updated_at
    WHERE t.transaction_id = NEW.transaction_id;
  END IF;
  RETURN NEW;
END $$;
CREATE FUNCTION public.sync_deal_to_new() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO core.deals SELECT NEW.* ON CONFLICT (deal_id) DO UPDATE SET deal_name = excluded.deal_name;
  RETURN NEW;
END $$;
CREATE FUNCTION public.sync_investor_to_new() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO core.investors SELECT NEW.* ON CONFLICT (investor_id) DO UPDATE SET full_name = excluded.full_name;
  RETURN NEW;
END $$;
COMMENT ON FUNCTION public.sync_deal_to_new() IS 'Keeps core.deals in step.';
REVOKE ALL ON FUNCTION public.sync_deal_to_new() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION public.sync_deal_to_new() TO service_role;
CREATE TRIGGER sync_transaction_to_new AFTER INSERT OR UPDATE ON public."transactions.transaction.primary"
FOR EACH ROW EXECUTE FUNCTION public.sync_transaction_to_new();
CREATE TRIGGER sync_deal_to_new AFTER INSERT OR UPDATE ON public."deals.deal"
FOR EACH ROW EXECUTE FUNCTION public.sync_deal_to_new();
CREATE TRIGGER sync_investor_to_new AFTER INSERT OR UPDATE ON public."investors.investor"
FOR EACH ROW EXECUTE FUNCTION public.sync_investor_to_new();
"""

# A number between 0 and 1 that depends on nothing but its arguments.
RANDOM = "(hashint8extended({}, {}) & 1048575)::numeric / 1048576"


def _random(of: str, salt: int) -> str:
    return RANDOM.format(of, salt)


def build(conn: psycopg.Connection[Any], world: World = REAL, *, seed: int = 1) -> None:
    """Make the old tables and fill them; rows come to their copies as the sync triggers would bring them."""
    conn.execute(DEFINITIONS.encode())
    w, s = world, seed * 100
    statements = [
        f"""INSERT INTO public."companies.company" (company_name, company_type, company_sector, country_incorporation,
              company_website, funding_round_stage, founding_year, latest_valuation_mil)
            SELECT 'Company ' || g, (ARRAY['startup', 'growth', 'mature', 'holding', 'spv'])[1 + g % 5], 'Technology',
              'United Arab Emirates', 'https://company-' || g || '.example', 'Series A', 1990 + g % 30, g * 1.5
            FROM generate_series(1, {w.companies}) AS g""",
        'INSERT INTO core.companies SELECT * FROM public."companies.company"',
        f"""INSERT INTO public."deals.deal" (deal_code, deal_name, deal_type, deal_category, deal_status,
              underlying_company_id, partner_company_id, holding_entity, deal_date, closing_date, initial_unit_price,
              gross_capital, initial_net_capital, deal_currency, structuring_fee_percent, premium_fee_percent,
              management_fee_percent, performance_fee_percent)
            SELECT 'D' || g, 'Deal number ' || g, 'primary', 'INVESTMENT', 'active', 1 + g % {w.companies},
              CASE WHEN g % 3 = 0 THEN 1 + (g * 7) % {w.companies} END, 1 + (g * 5) % {w.companies},
              current_date - {w.years} * 365 + g, current_date - {w.years} * 365 + g + 30, 10, 1000000, 950000, 'USD',
              2, 1, 2, 20
            FROM generate_series(1, {w.deals}) AS g""",
        'INSERT INTO core.deals SELECT * FROM public."deals.deal"',
        f"""INSERT INTO public."investors.investor" (id, investor_id, full_name, primary_email, investor_type,
              investor_status, kyc_status, nationality, country_of_residence, phone, join_date)
            SELECT g, g, 'Investor Number ' || g, CASE WHEN g % 10 > 0 THEN 'investor' || g || '@example.com' END,
              'individual', 'ACTIVE', 'verified', 'Emirati', 'United Arab Emirates', '+97150' || lpad(g::text, 7, '0'),
              current_date - {w.years} * 365 + g % 1000
            FROM generate_series(1, {w.investors}) AS g""",
        'INSERT INTO core.investors SELECT * FROM public."investors.investor"',
        f"""INSERT INTO public."transactions.transaction.primary" ({COLUMNS})
            SELECT g, 1 + g % {w.deals}, 1 + ({_random("g", s + 1)} * {w.investors - 1})::integer,
              current_date - 1 - ({_random("g", s + 2)} * {w.years} * 365)::integer,
              '{"pending" if w.lived else "completed"}',
              round({_random("g", s + 3)} * 10000, 2), round(1 + {_random("g", s + 4)} * 100, 4), v.gross,
              v.gross * 0.95, v.gross, (ARRAY['USD', 'USD', 'USD', 'USD', 'EUR', 'GBP'])[1 + g % 6], 750,
              2, 20, 2, 1, g % 7 = 0,
              'documents/deal-' || 1 + g % {w.deals} || '/term-sheet-' || g || '.pdf',
              'documents/deal-' || 1 + g % {w.deals} || '/closing-agreement-' || g || '.pdf', 0, v.gross, 0, 0, 0, 0,
              now() - interval '1 day' * (g % 2000), now() - interval '1 day' * (g % 2000)
            FROM generate_series(1, {w.primary}) AS g
            CROSS JOIN LATERAL (SELECT round((5000 + {_random("g", s + 5)} * 250000)::numeric, 2)) AS v (gross)""",
        f'INSERT INTO public.transactions ({COLUMNS}) SELECT {COLUMNS} FROM public."transactions.transaction.primary"',
        f'INSERT INTO core.transactions ({COLUMNS}) SELECT {COLUMNS} FROM public."transactions.transaction.primary"',
        f"""INSERT INTO public."transactions.transaction.subnominee" (sub_nominee_investor_link, transaction,
              gross_capital_nominee, initial_net_capital_nominee, subnominee_share_of_ticket, gross_capital_subnominee)
            SELECT 'Investor  number ' || 1 + g % {w.investors}, p.transaction_id, p.gross_capital, p.net_capital, 0.25,
              round(p.gross_capital * 0.25, 2)
            FROM generate_series(1, {w.subnominee}) AS g
            JOIN public."transactions.transaction.primary" AS p ON p.transaction_id = 1 + g % {w.primary}""",
        f"""INSERT INTO public."transactions.transaction.secondary" (deal_name_link, seller_name, buyer_name,
              subnominee_seller, transaction, unit_price, number_of_unit_sold, initial_net_capital, price_per_unit_sold,
              secondary_transaction_date)
            SELECT 'Deal number ' || p.deal_id, 'Investor Number ' || p.investor_id,
              'Investor Number ' || 1 + (p.investor_id + g) % {w.investors}, false, p.transaction_id, p.unit_price,
              round(p.units / 2, 2), p.net_capital, p.unit_price * 1.2, p.transaction_date + 1
            FROM generate_series(1, {w.secondary}) AS g
            JOIN public."transactions.transaction.primary" AS p ON p.transaction_id = 1 + (g * 3) % {w.primary}""",
        f"""SELECT setval(
              pg_get_serial_sequence('public."transactions.transaction.primary"', 'transaction_id'), {w.primary})""",
    ]
    for statement in statements:
        conn.execute(statement.encode())
    conn.execute(INDEXES.encode())
    conn.execute(TRIGGERS.encode())
    if world.lived:
        conn.execute("UPDATE public.\"transactions.transaction.primary\" SET status = 'completed'")
