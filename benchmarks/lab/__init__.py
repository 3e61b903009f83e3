"""What the benchmarks share. A study imports from here and from `aurora`, never from another study.

needs: optional packages.  options: command lines.  report: machine, tables, pictures, documents.
records: runs kept as lines of JSON. timing: contenders that take turns. models: encoders and
language models. data: rated texts. task: reading them. training: learning them. folds: the four
corpora, and who is judged by what. baselines: LoRA and MoSLoRA. settings: every setting as a row
of a table. methods: what the table's words do. estimates: means with standard errors. steps:
training steps to be timed and counted. rival: aurora-peft's process.
"""
