"""How the student is spread over processes: whole in each of them, or cut by ZeRO or FSDP2."""
