SELECT {{key}}
FROM {{table}} AS t
WHERE true
