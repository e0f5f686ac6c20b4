"""The SQL blocks of the Byzer-LLM document that deploy and call models, as they stand; only paths are changed."""

from __future__ import annotations

import json

import pytest

DEPLOY_AND_CALL = """
!byzerllm setup single;
!byzerllm setup "num_gpus=4";
!byzerllm setup "maxConcurrency=1";
!byzerllm setup "infer_backend=transformers";

run command as LLM.`` where
action="infer"
and pretrainedModelType="custom/llama2"
and localModelDir="{path}"
and reconnect="false"
and udfName="llama2_chat"
and modelTable="command";

select
llama2_chat(llm_param(map(
              "user_role","User",
              "assistant_role","Assistant",
              "system_msg",'You are a helpful assistant. Think it over and answer the user question correctly.',
              "instruction",llm_prompt('
Please remenber my name: {{0}}
',array("Zhu William"))

))) as q
as q1;
"""

DEPLOY_CONVERTED = """
-- deploy the huggingface model
!byzerllm setup single;

set node="master";
!byzerllm setup "num_gpus=2";
!byzerllm setup "workerMaxConcurrency=1";

run command as LLM.`` where
action="infer"
and pretrainedModelType="custom/auto"
and localModelDir="{path}"
and reconnect="false"
and udfName="my_3b_chat"
and modelTable="command";
"""

DEPLOY_FINETUNED = """
!byzerllm setup single;
run command as LLM.`` where
action="infer"
and localPathPrefix="/home/byzerllm/models/infer/jobs"
and localModelDir="{path}"
and pretrainedModelType="custom/llama2"
and udfName="fintune_llama2_chat"
and modelTable="command";
"""

SAAS = """
!byzerllm setup single;
!byzerllm setup "num_gpus=0";
!byzerllm setup "maxConcurrency=10";

run command as LLM.`` where
action="infer"
and pretrainedModelType="saas/zhipu"
and `saas.api_key`="sk-verysecretverysecret"
and `saas.model`="chatglm_lite"
and udfName="zhipu_saas"
and modelTable="command";
"""


def test_the_model_is_deployed_and_called(con, checkpoints):
    """Deploy, then a call with map, array, llm_param and llm_prompt, its result named q1."""
    con.execute("SET dialect='spark'")
    rows = con.execute(DEPLOY_AND_CALL.format(path=checkpoints["chat"])).fetchall()
    said = json.loads(rows[0][0])[0]
    assert isinstance(said["predict"], str)
    assert said["metadata"]["input_tokens_count"] > 30
    assert "Zhu William" in said["input"]["instruction"]
    assert con.execute("select llm_result(q) as a, llm_response_predict(q) as b from q1").fetchall() == [
        (said["predict"], said["predict"])
    ]
    assert con.execute('!byzerllm model exists "llama2_chat"').fetchone() == (True,)


@pytest.mark.parametrize(
    ("block", "name"), [(DEPLOY_CONVERTED, "my_3b_chat"), (DEPLOY_FINETUNED, "fintune_llama2_chat")]
)
def test_converted_and_finetuned_models_are_deployed(con, checkpoints, block, name):
    """The blocks that follow conversion and fine-tuning; old keys without meaning get one notice."""
    con.execute(block.format(path=checkpoints["chat"]))
    assert con.execute(f"SELECT {name}('hello', max_tokens := 4) IS NOT NULL").fetchone() == (True,)
    assert any("modelTable" in notice for notice in con.session.notices)


def test_a_provider_says_that_it_is_not_available_and_hides_the_key(con):
    """A saas block parses whole; the error names what can be deployed and never shows the key."""
    with pytest.raises(Exception, match="not available") as caught:
        con.execute(SAAS)
    assert "verysecret" not in str(caught.value)
