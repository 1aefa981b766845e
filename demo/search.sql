-- search.sql: the three functions that answer :query best, by :mode, under :condition.
SELECT format('%s(%s)', (hit).name, left((hit).arguments, 15)) AS function,
       left((hit).description, 35) AS description,
       round(score::numeric, 2) AS score
FROM autoembed.search(NULL::functions, :'query', max_rows => 3, mode => :'mode', condition => nullif(:'condition', ''));
