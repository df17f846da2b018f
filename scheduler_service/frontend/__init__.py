"""The front end: everything that is done once per stream.

One request's way through these files: service (RPCs) → generation, which asks validation, prompt (with tokenizer and
chat_template) and submit for what the core is told → core_client (the core's Unix socket) → streams (unsent tokens) →
opening (what comes before the tokens) and choice (with detokenizer, stop_strings and logprobs) → service. server.py
starts and stops it all.
"""
