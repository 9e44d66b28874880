"""Token sets: format, writing, verified random reading and the resumable stream."""

from forgetscale.data.format import content_hash, pack_doc_id, unpack_doc_id
from forgetscale.data.packing import ConcatPacker, cut_rows
from forgetscale.data.stream import StreamBatch, TokenStream, calibration_rows, open_stream
from forgetscale.data.token_set import DocumentPiece, TokenSet
from forgetscale.data.tokenizer import require_same_tokenizer, tokenizer_files, tokenizer_hash
from forgetscale.data.writer import ShardWriter, token_set_payload, write_token_set

__all__ = [
    "ConcatPacker",
    "DocumentPiece",
    "ShardWriter",
    "StreamBatch",
    "TokenSet",
    "TokenStream",
    "calibration_rows",
    "content_hash",
    "cut_rows",
    "open_stream",
    "pack_doc_id",
    "require_same_tokenizer",
    "token_set_payload",
    "tokenizer_files",
    "tokenizer_hash",
    "unpack_doc_id",
    "write_token_set",
]
