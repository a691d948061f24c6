"""All families, by the `model_type` of config.json."""

from moestro.nn.families.deepseek import DEEPSEEK_V3
from moestro.nn.families.dense import LLAMA, QWEN3
from moestro.nn.families.softmax import MIXTRAL, OLMOE, QWEN3_MOE

FAMILIES = {family.name: family for family in (MIXTRAL, OLMOE, QWEN3_MOE, DEEPSEEK_V3, LLAMA, QWEN3)}
