"""Token sets: format, writing, verified random reading and the resumable stream."""

from forgetscale.data.best_fit import BestFitPacker, best_fit_rows
from forgetscale.data.format import content_hash, pack_doc_id, unpack_doc_id
from forgetscale.data.logit_cache import LogitCache
from forgetscale.data.packing import ConcatPacker, OnePerRowPacker, Packer, cut_rows
from forgetscale.data.shard import find_damages
from forgetscale.data.skip_list import (
    SKIP_LIST_FILE,
    SkipList,
    SkippedRow,
    append_skips,
    read_skips,
    settle_skips,
)
from forgetscale.data.stream import StreamBatch, TokenStream, calibration_rows, open_stream
from forgetscale.data.token_set import DocumentPiece, TokenSet
from forgetscale.data.tokenizer import (
    require_same_tokenizer,
    require_vocabulary,
    tokenizer_files,
    tokenizer_hash,
)
from forgetscale.data.training_data import (
    DataPart,
    TrainingData,
    data_difference,
    open_data,
)
from forgetscale.data.writer import ShardWriter, token_set_payload, write_token_set

__all__ = [
    "SKIP_LIST_FILE",
    "BestFitPacker",
    "ConcatPacker",
    "DataPart",
    "DocumentPiece",
    "LogitCache",
    "OnePerRowPacker",
    "Packer",
    "ShardWriter",
    "SkipList",
    "SkippedRow",
    "StreamBatch",
    "TokenSet",
    "TokenStream",
    "TrainingData",
    "append_skips",
    "best_fit_rows",
    "calibration_rows",
    "content_hash",
    "cut_rows",
    "find_damages",
    "data_difference",
    "open_data",
    "open_stream",
    "pack_doc_id",
    "read_skips",
    "require_same_tokenizer",
    "require_vocabulary",
    "settle_skips",
    "token_set_payload",
    "tokenizer_files",
    "tokenizer_hash",
    "unpack_doc_id",
    "write_token_set",
]
