"""What each recipe of `train.fp8` costs in loss and gains in time, before it is paid for.

kin.py     the small kin of a model that is trained instead of it
curves.py  how far losses are from bf16's, beside what another seed changes; a table and a picture
run.py     trains the kin in bf16 and in each recipe, and asks the planner about the model itself"""
