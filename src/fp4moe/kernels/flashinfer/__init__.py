"""FlashInfer's kernels: TRT-LLM-Gen on Blackwell and CUTLASS, their rules and their layouts."""
