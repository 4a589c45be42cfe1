"""Processes: one workflow class per file. Options, queues and search attributes in `workflows.options`."""
