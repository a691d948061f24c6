"""A config.json read key by key, so that no setting goes unnoticed.

    Settings(config.json) -> integer, number, flag, only ... (a family asks for what it maps) -> finish

A key is one of four things: asked for by the family; HARMLESS, which changes nothing that is computed; TRAINING_ONLY,
which must be off; or unknown, which is an error. The user may leave out keys of the last two kinds by name, and then
they are reported; a key that a family asks for can never be left out.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from moestro.core.errors import FamilyError

Table = dict[str, Any]

_HARMLESS = """
_attn_implementation_autoset _name_or_path architectures attn_implementation auto_map bos_token_id
chunk_size_feed_forward do_sample dtype eos_token_id ep_size experts_implementation id2label is_encoder_decoder
label2id max_length max_position_embeddings model_type name_or_path num_labels num_mtp_layers num_nextn_predict_layers
output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type
repetition_penalty return_dict temperature tokenizer_class top_k top_p torch_dtype transformers_version use_cache
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Names, token ids, defaults of text generation, how the original library runs: nothing that changes logits."""

TRAINING_ONLY = {"attention_dropout": "dropout", "router_jitter_noise": "noise on the input of experts"}
"""What training would do with it; we have no such thing."""

QUANTISED = ("quantization_config", "compression_config")


class Settings:
    """The settings of one checkpoint.

    table      config.json
    defaults   what the original library takes for a missing key; a key without default must be there
    aliases    other names of a key
    leave_out  patterns of keys that the user gives up
    """

    def __init__(
        self, table: Table, defaults: Table, aliases: Mapping[str, str] | None = None, leave_out: Sequence[str] = ()
    ) -> None:
        self.table, self.defaults, self.leave_out = table, defaults, leave_out
        self.aliases = aliases or {}
        self.left_out: list[str] = []
        self._asked: set[str] = set()

    def get(self, key: str) -> Any:
        """The raw value, or the default."""
        names = [key, self.aliases.get(key, key)]
        self._asked.update(names)
        found = [self.table[name] for name in names if name in self.table]
        if found and found[0] != found[-1]:
            raise FamilyError(f"{names[0]} is {found[0]!r} but {names[1]} is {found[-1]!r}; they must agree")
        if not found and key not in self.defaults:
            raise FamilyError(f"{key} is missing from config.json")
        return found[0] if found else self.defaults[key]

    def integer(self, key: str, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise FamilyError(f"{key} is {value!r}; it must be a whole number of {least} or more")
        return value

    def optional_integer(self, key: str, least: int = 1) -> int | None:
        """The same, or None."""
        return None if self.get(key) is None else self.integer(key, least)

    def number(self, key: str) -> float:
        """A number of 0 or more."""
        return number(key, self.get(key))

    def flag(self, key: str) -> bool:
        """True or false; null counts as false."""
        value = self.get(key)
        if not isinstance(value, bool | None):
            raise FamilyError(f"{key} is {value!r}; it must be true or false")
        return bool(value)

    def only(self, key: str, *values: Any) -> None:
        """Raise unless the setting has one of the values that we can represent, the usual one first."""
        value = self.get(key)
        if value not in values:
            raise FamilyError(f"{key} is {value!r}; moestro has only {values[0]!r} and cannot take this model")

    def finish(self) -> None:
        """Raise FamilyError for every key that nobody asked for and that may matter."""
        for key in QUANTISED:
            if self.table.get(key):
                kind = self.table[key].get("quant_method", self.table[key])
                raise FamilyError(
                    f"{key} is {kind!r}; moestro reads plain fp32, bf16 and fp16 weights: convert them to bf16 first"
                )
        rest = {key: value for key, value in self.table.items() if key not in self._asked and key not in HARMLESS}
        problems = []
        for key, value in sorted(rest.items()):
            if value is None or (key in TRAINING_ONLY and not value):
                continue
            if any(fnmatchcase(key, pattern) for pattern in self.leave_out):
                self.left_out.append(f"{key} = {value!r}")
            elif key in TRAINING_ONLY:
                problems.append(f"{key} is {value!r}; moestro trains without {TRAINING_ONLY[key]}")
            else:
                problems.append(f"{key} is {value!r}; moestro does not know this setting")
        if problems:
            names = " ".join(f"--leave-out {text.partition(' ')[0]}" for text in problems)
            raise FamilyError(f"{'; '.join(problems)}: where that changes nothing you need, add {names}")


def number(key: str, value: Any) -> float:
    """A number of 0 or more; raises FamilyError naming `key`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise FamilyError(f"{key} is {value!r}; it must be a number of 0 or more")
    return float(value)
