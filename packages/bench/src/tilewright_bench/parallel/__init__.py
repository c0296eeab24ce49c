"""What a training step costs on several GPUs of one host, ours and torch's in one run.

`decoder` is what is trained, `setups` the ways of training it, `ladder` times them in turn, `trace`
reads from a profiler where communication lies, `results` what pages show of saved runs. The command
is in `command`: torchrun --nproc-per-node 4 -m tilewright_bench parallel.
"""
