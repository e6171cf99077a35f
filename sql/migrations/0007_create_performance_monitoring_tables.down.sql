-- Takes the monitor's tables away, unless they hold anything.

LOCK TABLE public.query_stats, public.query_metrics, public.system_metrics, public.performance_alerts
IN ACCESS EXCLUSIVE MODE;

DO $$
BEGIN
  IF
    EXISTS (SELECT FROM public.query_stats)
    OR EXISTS (SELECT FROM public.query_metrics)
    OR EXISTS (SELECT FROM public.system_metrics)
    OR EXISTS (SELECT FROM public.performance_alerts)
  THEN
    RAISE EXCEPTION 'query_stats, query_metrics, system_metrics or performance_alerts holds rows'
      USING
        ERRCODE = 'object_in_use',
        HINT = 'If nobody needs them, delete them first.';
  END IF;
END
$$;

DROP FUNCTION equitie_private.query_stats_by_hour(timestamptz);
DROP FUNCTION equitie_private.refresh_query_stats_hourly();
DROP MATERIALIZED VIEW equitie_private.query_stats_hourly;
DROP FUNCTION equitie_private.raise_alerts(jsonb);
DROP FUNCTION equitie_private.record_system_metrics(jsonb);
DROP FUNCTION equitie_private.record_query_stats(jsonb);
DROP AGGREGATE equitie_private.sum_buckets(jsonb);
DROP FUNCTION equitie_private.add_buckets(jsonb, jsonb);
DROP TABLE public.performance_alerts;
DROP TABLE public.system_metrics;
DROP TABLE public.query_metrics;
DROP TABLE public.query_stats;
