SELECT {{key}}
FROM {{table}} AS t
CROSS JOIN LATERAL (SELECT {{sent_keys}} FROM (SELECT $1 AS key) AS s) AS s
WHERE true
