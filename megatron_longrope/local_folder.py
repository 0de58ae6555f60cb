"""How transformers loads a folder: nothing is downloaded, no code of the folder's author runs."""

LOCAL_ONLY = {"local_files_only": True, "trust_remote_code": False}
"""For every `from_pretrained`. False refuses what needs custom code; the default, None, asks on the
terminal, and a "y" would download and run it."""
