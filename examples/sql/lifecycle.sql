-- The whole life of a small language model, in SQL, on a laptop's CPU; nothing is downloaded.
--   sqlext run examples/sql/lifecycle.sql
-- A model is trained from nothing to sort the letters of a word, deployed and asked; then it is fine-tuned to sort them
-- backwards. Whether it can is asked on words that it has never seen: those of DuckDB's own manual.

-- 1. Rows. 100,000 words that nobody uses to learn from, and real words, none of them among the others, to be asked.
CREATE TABLE manual AS
SELECT DISTINCT word
FROM (SELECT unnest(regexp_extract_all(lower(description), '[a-z]+')) AS word FROM duckdb_functions())
WHERE length(word) BETWEEN 3 AND 4;

CREATE TABLE words AS
WITH made_up AS (
  SELECT i, array_to_string(list_transform(range(3 + i % 2), lambda p: chr((97 + hash(8 * i + p) % 26)::INT)), '') AS word
  FROM range(100000) r(i)
)
SELECT i, word, array_to_string(list_sort(string_split(word, '')), '') AS sorted
FROM made_up ANTI JOIN manual USING (word);

CREATE TABLE pages AS SELECT 'sort ' || word || ' = ' || sorted AS text FROM words ORDER BY i;

-- 2. Pretrain: a tokenizer from the table, a Llama from these sizes alone.
!llm setup sfft "cpus_per_worker=1";
RUN command AS LLM.`` WHERE action="finetune" AND pretrainedModelType="sfft/llama" AND inputTable="pages"
    AND name="sorter" AND localPathPrefix="build/jobs" AND detached="false" AND outputTable="pretrained"
    AND `sfft.int.vocab_size`="262" AND `sfft.int.max_length`="128" AND `sfft.int.hidden_size`="96"
    AND `sfft.int.intermediate_size`="192" AND `sfft.int.num_hidden_layers`="2"
    AND `sfft.int.per_device_train_batch_size`="16" AND `sfft.float.learning_rate`="4e-3";

-- 3. Convert: the weights in half the bytes.
SET trained="SELECT model FROM pretrained" WHERE type="sql";
RUN command AS LLM.`` WHERE action="convert" AND modelNameOrPath="${trained}" AND to="bfloat16"
    AND savePath="build/models/sorter" AND overwrite="true";

-- 4. Deploy it and ask.
!llm setup single;
RUN command AS LLM.`build/models/sorter` WHERE action="infer" AND udfName="sorter" AND `generation.max_tokens`="10";

SELECT word, trim(sorter('sort ' || word || ' =')) AS sorted FROM (VALUES ('duck'), ('view'), ('rows')) t(word);

SELECT count(*) > 100 AS enough_words,
       avg(coalesce(trim(sorter('sort ' || word || ' =')) = array_to_string(list_sort(string_split(word, '')), ''), false)::INT)
         >= 0.95 AS right_on_95_percent
FROM manual;

-- 5. Fine-tune with LoRA on questions and answers: the same letters, from z to a. The prompt format says how they are
--    written; training and serving use the same one.
CREATE TABLE lessons AS SELECT 'back ' || word AS instruction, reverse(sorted) AS output FROM words WHERE i < 4000;

SET format='''{"system": "{instruction}", "user": "{instruction} =", "assistant": " {instruction}<|end|>", "bos": "<s>"}''';

!llm setup sft "cpus_per_worker=1";
RUN lessons AS LLM.`build/models/sorter` WHERE action="finetune" AND pretrainedModelType="sft/llama"
    AND name="backward" AND localPathPrefix="build/jobs" AND detached="false" AND outputTable="tuned"
    AND prompt_format='''${format}''' AND `sft.float.learning_rate`="5e-3" AND `sft.float.lora_dropout`="0"
    AND `sft.int.per_device_train_batch_size`="32" AND `sft.int.epochs`="4";

-- 6. Merge the adapter into its base, deploy the result beside it.
SET adapter="SELECT model FROM tuned" WHERE type="sql";
RUN command AS LLM.`` WHERE action="merge" AND modelNameOrPath="build/models/sorter" AND adapterNameOrPath="${adapter}"
    AND savePath="build/models/backward" AND overwrite="true";

!llm setup single;
RUN command AS LLM.`build/models/backward` WHERE action="infer" AND udfName="backward" AND `generation.max_tokens`="10";

-- 7. Did it get better? Both models on the words that neither has seen. An answer that failed is a wrong one.
CREATE TABLE exam AS
SELECT word, reverse(array_to_string(list_sort(string_split(word, '')), '')) AS expected,
       trim(sorter('back ' || word || ' =')) AS base, trim(backward('back ' || word)) AS tuned
FROM manual;

SELECT word, expected, tuned FROM exam WHERE word IN ('last', 'list') ORDER BY word;

-- The pattern for any two models: rows that only the new one had right, rows that only the old one had right, and the
-- gain with its 95 % confidence interval for pairs (Agresti and Min, 2005), which also holds when all answers agree.
CREATE TABLE verdict AS
WITH marks AS (
  SELECT coalesce(base = expected, false) AS old, coalesce(tuned = expected, false) AS new FROM exam
)
SELECT count(*) AS rows, avg(old::INT) AS base, avg(new::INT) AS tuned,
       count_if(new AND NOT old) AS won, count_if(old AND NOT new) AS lost, (won - lost) / (rows + 2) AS gain,
       1.96 * sqrt(won + lost + 1 - (won - lost) ** 2 / (rows + 2)) / (rows + 2) AS plus_minus
FROM marks;

SELECT gain - plus_minus > 0.5 AS clearly_better FROM verdict;
