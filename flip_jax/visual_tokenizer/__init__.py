"""A visual tokenizer trained on any records, and the folder that holds one."""
