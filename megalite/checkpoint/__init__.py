"""Checkpoints: Hugging Face model folders with the optimizer state beside the weights, independent
of the layout.

    step-00000100/
      config.json, tokenizer…, model-*.safetensors, model.safetensors.index.json     what transformers and vLLM open
      optimizer/{master,exp_avg,exp_avg_sq}-*.safetensors, and an index each         fp32, under the same names
      train_state.json                                                               step, data position, recent losses
      manifest.json                                                                  size and SHA-256 of every file

A folder without a valid manifest does not count: it is written as step-N.tmp, and renamed when
complete and on disk.
"""
