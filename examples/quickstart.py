"""Calibrate py-16m on the standard library, plan 50 % activation sparsity, and generate."""

import sysconfig
from pathlib import Path

import teal

MODEL = str(Path(__file__).parents[1] / "models/py-16m")
TEXT = Path(sysconfig.get_path("stdlib")) / "typing.py"

model, tokenizer = teal.load_model(MODEL, device="cpu"), teal.load_tokenizer(MODEL)
windows = teal.token_windows(TEXT, tokenizer, sequence_length=1024, max_tokens=10240)
stats = teal.calibrate(model, windows)
plan = teal.allocate(stats, sparsity=0.5)
teal.sparsify(model, plan)
prompt = tokenizer("import os\n\ndef read_json(path):", return_tensors="pt")
with teal.measure_sparsity(model) as meters:
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(output[0]))
effective = plan.model.mean_sparsity({name: meter.sparsity for name, meter in meters.items()})
print(f"target sparsity {plan.target_sparsity:.0%}, effective {effective:.1%}")
