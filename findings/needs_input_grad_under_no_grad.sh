#!/usr/bin/env bash
# torch 2.13.0: under torch.no_grad() a custom autograd.Function is still told that its inputs need
# gradients. ctx.needs_input_grad says which inputs have requires_grad, and torch.is_grad_enabled()
# is False inside of forward in any case. So a function that computes its gradients in forward, as
# fused linear cross-entropies do, computes them in evaluations, too, unless its caller passes
# torch.is_grad_enabled() along.
#
#     needs_input_grad, with gradients (True,), without (True,); is_grad_enabled inside False, False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy --extra-index-url https://download.pytorch.org/whl/cpu
"$work/venv/bin/python" - << 'EOF'
import torch

seen = []


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        seen.append((ctx.needs_input_grad, torch.is_grad_enabled()))
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


x = torch.ones(3, requires_grad=True)
Double.apply(x)
with torch.no_grad():
    Double.apply(x)
(with_grad, inside), (without_grad, inside_too) = seen
print(f"torch {torch.__version__}: needs_input_grad, with gradients {with_grad}, without "
      f"{without_grad}; is_grad_enabled inside {inside}, {inside_too}")
assert with_grad == without_grad == (True,)
assert not inside and not inside_too
EOF
