-- Lanes and what each holds.

CREATE TABLE autoembed.lane (
    pid integer NOT NULL,
    backend_start timestamptz NOT NULL,
    claimed_at timestamptz,
    message_ids bigint[] NOT NULL DEFAULT '{}',
    stop boolean NOT NULL DEFAULT false,
    backfill boolean NOT NULL DEFAULT false,
    PRIMARY KEY (pid, backend_start)
);
COMMENT ON TABLE autoembed.lane IS
    'The lanes and what each holds; when its backend is gone, the next lane frees its jobs.';
COMMENT ON COLUMN autoembed.lane.pid IS 'The lane''s process, as in pg_stat_activity.';
COMMENT ON COLUMN autoembed.lane.backend_start IS 'When that process started: tells it from a later one of the same id.';
COMMENT ON COLUMN autoembed.lane.claimed_at IS 'When it claimed what it holds.';
COMMENT ON COLUMN autoembed.lane.message_ids IS 'The messages it holds.';
COMMENT ON COLUMN autoembed.lane.stop IS 'Whether it was asked to stop.';
COMMENT ON COLUMN autoembed.lane.backfill IS 'Whether it looks through tables and leaves the queue to others.';
