"""The two description files of a model: managementinfo.json and technicalinfo.json (specification 8.2.4).

    describe(source, options) -> both tables, from config.json or model.json and what the user says
    check_management / check_technical   what a reader requires; unknown keys are kept

Ordinary JSON: floats are allowed here, duplicate keys and depth over 32 are not.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from moestro.core.errors import FormatError
from moestro.package import canonical
from moestro.package.fields import DATE
from moestro.package.limits import MAX_DESCRIPTION_BYTES, MAX_JSON_INT
from moestro.package.paths import check_model_id, check_path

Table = dict[str, Any]
MANAGEMENT, TECHNICAL = "gbt42382.2/managementinfo/1", "gbt42382.2/technicalinfo/1"
ENCODER, DECODER, ENCODER_DECODER, OTHER = 0, 1, 2, 255
RELATIONS = ("finetune", "quantize", "prune", "distill", "residual")
TASKS = {
    "ForCausalLM": ("text-generation", DECODER),
    "LMHeadModel": ("text-generation", DECODER),
    "ForMaskedLM": ("feature-extraction", ENCODER),
    "ForSequenceClassification": ("text-classification", ENCODER),
    "ForQuestionAnswering": ("question-answering", ENCODER),
    "ForImageClassification": ("image-classification", ENCODER),
    "ForObjectDetection": ("object-detection", ENCODER),
    "ForSpeechSeq2Seq": ("speech-recognition", ENCODER_DECODER),
    "ForConditionalGeneration": ("other", ENCODER_DECODER),
    "ForCTC": ("speech-recognition", ENCODER),
}
"""How a class name of `transformers` ends -> (task, architecture_type)."""
PTM_KEYS = {
    "hidden_size": ("hidden_size", "d_model", "n_embd", "width"),
    "num_blocks": ("num_hidden_layers", "num_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head", "encoder_attention_heads", "num_heads"),
    "vocab_size": ("vocab_size",),
    "max_sequence_length": ("max_position_embeddings", "n_positions", "max_length"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "ffn_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "top_k_experts": ("num_experts_per_tok", "moe_top_k"),
}
"""PTM_info's keys and what configurations call them."""
REQUIRED_PTM = ("hidden_size", "num_blocks", "num_heads", "vocab_size", "max_sequence_length")


def dumps(table: Mapping[str, Any]) -> bytes:
    """One spelling, for people and for reproducible packages."""
    return (json.dumps(table, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def management_info(model_id: str, given: Mapping[str, Any], parameters: int, size: int, readme: bytes) -> Table:
    """managementinfo.json.

    given    what the user says: model_name, model_version, license, authors, description, created_at, parent
    readme   README.md, whose front matter may state the licence
    """
    table: Table = {"schema": MANAGEMENT, "model_id": model_id, "model_name": model_id, "model_version": "1.0.0"}
    table |= {"license": _license(readme), "model_size": {"parameters": short_count(parameters), "bytes": size}}
    return table | {key: value for key, value in given.items() if value not in (None, "", [])}


def _license(readme: bytes) -> str:
    front = re.match(rb"---\n(.*?)\n---", readme, re.DOTALL)
    found = re.search(rb"^license:\s*['\"]?([A-Za-z0-9.+-]{1,60})['\"]?\s*$", front[1], re.MULTILINE) if front else None
    return found[1].decode() if found else "LicenseRef-not-stated"


def short_count(number: int) -> str:
    """1_100_000_000 -> '1.1B'."""
    for size, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return str(number)


def technical_info(config: Mapping[str, Any], compact: int, files: list[str]) -> Table:
    """technicalinfo.json from a configuration of `transformers` or of our own."""
    ours = "attention" in config and "num_layers" in config
    flat = {**config, **_inner(config, "moe"), **_inner(config, "attention")} if ours else _flat(config)
    named = config.get("architectures")
    class_name = str(named[0]) if isinstance(named, list) and named else ""
    task, kind = next((value for end, value in TASKS.items() if class_name.endswith(end)), ("other", OTHER))
    if ours:
        task, kind = "text-generation", DECODER
    if config.get("is_encoder_decoder") is True:
        kind = ENCODER_DECODER
    return {
        "schema": TECHNICAL,
        "representation_version": 1,
        "compact": compact,
        "task": {"type": task},
        "input": [{"modality": "text", "name": "input_ids", "dtype": "int64", "shape": [-1, -1], "layout": "BS"}],
        "PTM_info": _ptm_info(flat, "moestro" if ours else _word(config.get("model_type")), kind),
        "files": [{"path": path, "shard": index} for index, path in enumerate(files, 1)],
    }


def _flat(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Multi-modal configurations keep the language model's numbers one level down."""
    return {**_inner(config, "text_config"), **config}


def _inner(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _word(value: object) -> str:
    """A printable name as configurations give it."""
    return value if isinstance(value, str) and value.isprintable() and 1 <= len(value) <= 100 else "other"


def _ptm_info(config: Mapping[str, Any], architecture: str, kind: int) -> Table:
    info: Table = {"architecture": architecture, "architecture_type": kind}
    for key, names in PTM_KEYS.items():
        found = next(
            (config[name] for name in names if type(config.get(name)) is int and 0 <= config[name] <= MAX_JSON_INT),
            None,
        )
        if found is not None or key in REQUIRED_PTM:
            info[key] = found or 0
    techniques = ["MoE"] if info.get("num_experts") else []
    heads, groups = info["num_heads"], info.get("num_kv_heads") or info["num_heads"]
    techniques += ["MQA"] if groups == 1 < heads else ["GQA"] if groups < heads else []
    info |= {"techniques": ",".join(techniques)} if techniques else {}
    tied = config.get("tie_word_embeddings", config.get("tie_embeddings"))
    return info | ({"tie_embeddings": tied} if isinstance(tied, bool) else {})


def check_management(data: bytes, model_id: str) -> Table:
    """Parse managementinfo.json and check what the specification requires."""
    table = _object(data, "managementinfo.json", MANAGEMENT)
    for key in ("model_id", "model_name", "model_version", "license", "created_at"):
        if not isinstance(table.get(key), str):
            raise FormatError(f"managementinfo.json of {model_id} must have the text {key}")
    if check_model_id(table["model_id"]) != model_id:
        raise FormatError(f"managementinfo.json below {model_id} is of {table['model_id']}")
    if not DATE.fullmatch(table["created_at"]):
        raise FormatError(f"managementinfo.json of {model_id}: created_at is not like 2026-11-21T00:00:00Z")
    if not isinstance(table.get("model_size"), dict):
        raise FormatError(f"managementinfo.json of {model_id} must have the object model_size")
    parent = table.get("parent")
    if parent is not None and (not isinstance(parent, dict) or parent.get("relation") not in RELATIONS):
        raise FormatError(f"managementinfo.json of {model_id}: parent must have a relation of {RELATIONS}")
    return table


def check_technical(data: bytes, model_id: str) -> Table:
    """Parse technicalinfo.json and check what the specification requires."""
    where = f"technicalinfo.json of {model_id}"
    table = _object(data, "technicalinfo.json", TECHNICAL)
    if type(table.get("representation_version")) is not int or table.get("compact") not in (0, 1, 2):
        raise FormatError(f"{where} must have representation_version and compact (0, 1 or 2)")
    for key, kind in (("task", dict), ("input", list), ("files", list)):
        if not isinstance(table.get(key), kind):
            raise FormatError(f"{where} must have {key} as a JSON {'object' if kind is dict else 'list'}")
    if not isinstance(table.get("PTM_info", {}), dict):
        raise FormatError(f"{where} must have PTM_info as a JSON object")
    for entry in table["files"]:
        check_path(entry.get("path") if isinstance(entry, dict) else entry)
    if "converter_confg" in table:  # the draft's spelling
        table.setdefault("converter_config", table["converter_confg"])
    return table


def _object(data: bytes, name: str, schema: str) -> Table:
    table = canonical.loads_loosely(data, MAX_DESCRIPTION_BYTES, name)
    if not isinstance(table, dict) or table.get("schema") != schema:
        raise FormatError(f"{name} does not have the schema {schema}")
    return table
