"""From facts to token rows: encoding with the subject's place, random-prefix contexts, padding that lines rows up."""

from .align import Aligned, align
from .contexts import Context, make_contexts
from .encode import Encoding, encode
from .growing import Growing

__all__ = ["Aligned", "Context", "Encoding", "Growing", "align", "encode", "make_contexts"]
