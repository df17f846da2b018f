"""What both services and the client's launcher need of an operating system: settings, logging, kept-alive children.

Standard library only, and nothing of ours is imported here.
"""
