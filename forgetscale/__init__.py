"""ForgetScale: adapt large language models on ZeRO-3 shards without losing what they know."""

__version__ = "0.5.0"
