-- poison.sql: the provider fake stands for an API that refuses a text.
SELECT autoembed.create_model('strict', 'fake', 8, options => '{
    "faults": [
        {"match": "poison", "status": 400, "message": "not these words"}
    ]}');

CREATE TABLE tickets (id integer PRIMARY KEY, body text);

SELECT autoembed.enable('tickets',
    content_columns => '{body}', model => 'strict');

INSERT INTO tickets VALUES
    (1, 'the door is stuck'), (2, 'a poison'), (3, 'no light');
