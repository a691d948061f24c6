"""`core.config`: recipes come back checked, or as one line that names the key, its value and the remedy."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from moestro.core.config import STRICT, build, read_toml, save_toml, with_overrides
from moestro.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Wheel:
    __pydantic_config__ = STRICT
    radius: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Car:
    __pydantic_config__ = STRICT
    seats: int
    wheel: Wheel = field(default_factory=Wheel)
    spare: Wheel | None = None
    folder: Path = Path("here")
    colours: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seats < 1:
            raise ConfigError(f"seats is {self.seats}; it must be 1 or more")


def test_numbers_with_colons_are_no_time_of_day() -> None:
    assert with_overrides({}, ["shares=10:20:30"]) == {"shares": "10:20:30"}


def test_overrides_reach_into_tables_and_leave_the_original_alone() -> None:
    table = {"wheel": {"radius": 1.0}}
    merged = with_overrides(table, ["wheel.radius=2.5", "seats=4", "colours=['red', 'blue']", "folder=a/b"])
    assert build(Car, merged) == Car(seats=4, wheel=Wheel(radius=2.5), colours=("red", "blue"), folder=Path("a/b"))
    assert table == {"wheel": {"radius": 1.0}}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"seats": 4, "wheel": {"raduis": 1}}, "wheel.raduis is not a known key; did you mean wheel.radius?"),
        ({"seats": 4, "radius": 1}, "radius is not a known key; did you mean wheel.radius?"),
        ({"seats": "many"}, "seats is 'many'; it must be a valid integer"),
        ({}, "seats is missing; set it in the recipe or as seats=VALUE"),
        ({"seats": 0}, "seats is 0; it must be 1 or more"),
    ],
)
def test_a_wrong_key_is_named_with_its_remedy(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        build(Car, table)


@pytest.mark.parametrize("setting", ["seats", "=4"])
def test_a_setting_needs_a_name_and_a_value(setting: str) -> None:
    with pytest.raises(ConfigError, match="write key=value"):
        with_overrides({}, [setting])


def test_a_setting_cannot_go_through_a_value() -> None:
    with pytest.raises(ConfigError, match=r"seats.left cannot be set: seats is a value"):
        with_overrides({"seats": 4}, ["seats.left=2"])


def test_saved_toml_reads_back_as_the_same_spec(tmp_path: Path) -> None:
    car = Car(seats=2, spare=Wheel(radius=3.0), colours=("red",))
    save_toml(tmp_path / "car.toml", car)
    assert build(Car, read_toml(tmp_path / "car.toml")) == car


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("seats = = 2")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML: .*line 1"):
        read_toml(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="does not exist"):
        read_toml(tmp_path / "absent.toml")
