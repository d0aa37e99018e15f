"""Packed table layouts: numpy encode and decode."""
from typing import Literal
Storage = Literal["fp32", "fp16", "int8"]
class Packed: ...
