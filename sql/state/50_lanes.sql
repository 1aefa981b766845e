-- The lanes and the messages that each holds.

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
    'The lanes and the messages that each holds. When the backend of a lane is gone, the next lane frees its messages.';
COMMENT ON COLUMN autoembed.lane.pid IS 'The lane''s process, as in pg_stat_activity.';
COMMENT ON COLUMN autoembed.lane.backend_start IS
    'When that process started. A later process may have the same id, but not the same start.';
COMMENT ON COLUMN autoembed.lane.claimed_at IS 'When it last claimed messages.';
COMMENT ON COLUMN autoembed.lane.message_ids IS 'The messages that it holds.';
COMMENT ON COLUMN autoembed.lane.stop IS 'Whether it is asked to stop.';
COMMENT ON COLUMN autoembed.lane.backfill IS 'Whether it scans tables and leaves the queue to other lanes.';
