"""The whole path on a real model: train, merge, bake, verify, convert with llama.cpp's converter, run in llama.cpp."""

import json
import os
import shutil

import pytest
import torch
from helpers import sft_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from fnsft_trl.cli import main
from fnsft_trl.data.embedded import embedded_model
from fnsft_trl.export.gguf import CONVERTER, CONVERTER_VARIABLE


pytestmark = pytest.mark.slow

PROMPTS = ("The capital of France is", "Water boils at", "Once upon a time", "1, 2, 3, 4,", "The opposite of hot is")
TOKENS = 20
