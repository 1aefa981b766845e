-- Gives the text of one row, for triggers, where the text or the condition is the owner's code. Runs as the table's
-- owner.
CREATE FUNCTION autoembed._text_{{id}}(r anyelement)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SECURITY DEFINER
    SET search_path = {{search_path}}
    {{output_settings}}
AS $body$
#variable_conflict use_column
BEGIN
    {{content_guard}}
    {{compute_virtual}}
    RETURN {{content_of_r}};
END;
$body$
