-- Lanes of the version before run with its Python. They end, and the next ones run with the new.
LOCK TABLE autoembed.lane IN ACCESS EXCLUSIVE MODE;
UPDATE autoembed.lane SET stop = true;

-- Replaced by _keep_restored_queue() and _keep_restored_model().
DROP FUNCTION autoembed._keep_restored CASCADE;
-- Replaced by _create_function() and the templates.
DROP FUNCTION autoembed._create_owned;
DROP FUNCTION autoembed._build_capture;
-- A parameter has another name.
DROP FUNCTION autoembed._drop_functions;
