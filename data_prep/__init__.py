"""Offline data preparation: raw text and chats become verified token shards."""
