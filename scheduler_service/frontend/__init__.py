"""The front end: everything that is done once per stream.

One request's way through these files: service (RPCs) → validation → tokenizer and chat_template → core_client (the
core's Unix socket) → streams (unsent tokens) → detokenizer → service. server.py starts and stops it all.
"""
