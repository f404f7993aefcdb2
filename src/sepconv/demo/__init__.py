"""The job behind `sepconv demo`: real networks and images, stock layers and ours side by side.

`data` finds the inputs, `pretrained` swaps layers in a published network, `training` trains a small
one, `report` shows what came out, and `run` does all of it in order.
"""
