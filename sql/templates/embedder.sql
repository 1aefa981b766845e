-- Calls the function that a model names. Runs as that function's owner, in lanes and in embed().
CREATE FUNCTION autoembed.{{wrapper}}(texts text[])
    RETURNS {{returned_type}}
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = {{search_path}}
AS $body$
#variable_conflict use_column
BEGIN
    RETURN {{function}}(texts);
END;
$body$
