"""How much of anything a stranger's file may hold, each limit with its reason; beyond it a file is refused.

They are checked before memory is taken for what is counted. What has no number is elsewhere: only ordinary files are
opened (`inputs`), what an index names lies in its folder (`records`), companions lie there or in the Hub's cache after
all links (`companions`), an archive's members are stored, not compressed, and together no larger than it (`pickled`).
"""

from __future__ import annotations

#: Of a safetensors header, and of any other JSON: the safetensors library's own limit for a header.
MAX_JSON_BYTES = 100_000_000
#: Every value costs a hundred bytes and more once decoded; 200,000 tensors have as many.
MAX_JSON_VALUES = 2_000_000
#: Characters of a tensor's name: the longest in use have 150, and a message shows it.
MAX_NAME = 1000
#: Of a tensor: numpy's limit before 2.0.
MAX_DIMENSIONS = 32
#: Of pickled instructions, a few hundred for each tensor; what they make may take a hundred times the memory.
MAX_PICKLE_BYTES = 8_000_000
#: Of an archive's directory: of 200,000 members, which are as many tensors.
MAX_DIRECTORY_BYTES = 32_000_000
#: Of a model card's front matter: YAML is read at some 100 kB a second.
MAX_CARD_BYTES = 100_000
