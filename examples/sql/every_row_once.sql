-- Every row once: what a statement is going to ask, what it asked, and what is not asked again.
-- Needs the model that `make quickstart` trains; no key, no download.

RUN command AS LLM.`build/small-model` WHERE action="infer" AND udfName="define" AND `generation.max_tokens`="30";

-- Answers outlive the session. These are forgotten, so that this script asks for them also when it runs again.
!llm cache clear "define";

-- 1. Before anything is asked: 1,000 rows hold 4 different questions, so that 4 calls will be made.
CREATE TABLE questions AS
SELECT i AS id, 'What does ' || ['median', 'upper', 'floor', 'array_length'][i % 4 + 1] || ' do?' AS question
FROM range(1000) t(i);

EXPLAIN LLM CREATE TABLE answers AS SELECT *, define(question) AS answer FROM questions;

-- 2. A budget bounds what a statement may spend; it would not be within one of 3 rows.
!llm setup "max_rows=3";
EXPLAIN LLM CREATE TABLE answers AS SELECT *, define(question) AS answer FROM questions;
!llm setup "max_rows=100" "max_tokens_total=50000";

-- 3. The table is made, and made again: the second time without a call.
CREATE TABLE answers AS SELECT *, define(question) AS answer FROM questions;
CREATE OR REPLACE TABLE answers AS SELECT *, define(question) AS answer FROM questions;

SELECT answer, count(*) AS rows FROM answers GROUP BY answer ORDER BY answer;
SELECT statement, rows, calls, reused, errors FROM llm_calls ORDER BY statement;

-- 4. Where the answers are: one file for all sessions. Its rows are the table llm_results.
!llm cache;
SELECT output, prompt_tokens, completion_tokens FROM llm_results WHERE model = 'define' ORDER BY output;

-- 5. Two more rows, one of them too long for the model: it fails alone, and only these two are asked.
INSERT INTO questions VALUES (1000, 'What does lower do?'), (1001, repeat('What does lower do? ', 100));
CREATE OR REPLACE TABLE answers AS SELECT *, define(question) AS answer FROM questions;

SELECT code, message, attempts FROM llm_errors;
SELECT count(*) AS rows, count(answer) AS answered FROM answers;

-- 6. `!llm retry` asks failed rows again, say when a provider is back. This one fails again: the row has to be mended.
!llm retry;
UPDATE questions SET question = left(question, 19) WHERE id = 1001;
CREATE OR REPLACE TABLE answers AS SELECT *, define(question) AS answer FROM questions;

SELECT count(*) AS rows, count(answer) AS answered FROM answers;
SELECT rows, calls, reused, errors FROM llm_calls ORDER BY statement DESC LIMIT 1;

-- 7. prompt() puts columns into a text. {*} stands for all that is not named, with what often repeats in front:
--    an engine that remembers how a prompt began need not read that again. load_balance=prefix sends such rows to the
--    same worker.
CREATE TABLE prompts AS
SELECT prompt('Is this about texts? {*}', {'id': id, 'question': question, 'source': 'DuckDB'}) AS prompt FROM questions;

SELECT prompt FROM prompts ORDER BY prompt LIMIT 3;

SELECT define(prompt('What does {name} do?', {'name': name})) AS answer FROM (VALUES ('upper'), ('lower')) t(name);
