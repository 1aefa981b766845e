-- Calls the function that a rerank model names. Runs as that function's owner, in search().
CREATE FUNCTION autoembed.{{wrapper}}(query text, passages text[])
    RETURNS {{returned_type}}
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = {{search_path}}
AS $body$
#variable_conflict use_column
BEGIN
    RETURN {{function}}(query, passages);
END;
$body$
