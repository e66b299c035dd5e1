"""Everything by name: `names` (what exists), `load` (networks with weights), `exit_config` (what is stored with them),
`hub_files` (downloads)."""
