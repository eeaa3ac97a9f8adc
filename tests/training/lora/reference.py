"""Slow reference of a recorded Fisher, entry by entry in float64, from the gradients of the weights themselves."""

import torch


class Reference:
    """Averages of ``(G z)^2`` and ``(G^T u)^2`` with the signs of a recorder, and of ``g^2`` of parameters held whole.

    The frozen weights get gradients of their own, so that G comes from autograd, and is accumulated, unscaled and
    clipped with all other gradients.
    """

    def __init__(self, recorder):
        self.recorder, self.beta = recorder, recorder.beta
        self.weights = {n: p.layer.module.get_base_layer().weight for n, p in recorder._probes.items()}
        self.rows, self.columns, self.whole, self.steps = {}, {}, {}, 0
        for weight in self.weights.values():
            weight.requires_grad_(True)

    def gradient(self, name):
        """Return G of a weight, shape ``[out, in]``."""
        gradient = self.weights[name].grad.double()
        return gradient.T if self.recorder._probes[name].layer.transposed else gradient

    def add(self):
        """Add the present gradients; call the method before the recorder's update, which draws new signs."""
        self.steps += 1
        for name, probe in self.recorder._probes.items():
            g = self.gradient(name).tolist()
            z, u = probe.z.tolist(), probe.u.tolist()
            rows = [sum(g[o][i] * z[i] for i in range(len(z))) ** 2 for o in range(len(u))]
            columns = [sum(g[o][i] * u[o] for o in range(len(u))) ** 2 for i in range(len(z))]
            for averages, new in ((self.rows, rows), (self.columns, columns)):
                old = averages.get(name, [0.0] * len(new))
                averages[name] = [self.beta * a + (1 - self.beta) * b for a, b in zip(old, new, strict=True)]
        for name, parameter in self.recorder._lora.whole.items():
            square = parameter.grad.double().square() * (1 - self.beta)
            self.whole[name] = self.beta * self.whole.get(name, torch.zeros_like(square)) + square

    def check(self, fisher, rtol):
        """Compare a Fisher with the averages, entry by entry, to a share of the largest entry of each weight."""
        assert set(fisher) == {*self.rows, *self.whole}
        for name in fisher:
            expected = self.expected(name)
            atol = float(expected.max()) * rtol
            assert torch.allclose(fisher[name].double(), expected, rtol=rtol, atol=atol), name

    def expected(self, name):
        """Return F of a weight as it is stored."""
        bias = 1 - self.beta**self.steps
        if name in self.whole:
            return self.whole[name] / bias
        rows, columns = self.rows[name], self.columns[name]
        rho = [row / bias / len(columns) for row in rows]
        kappa = [column / bias / len(rows) for column in columns]
        by_rows, by_columns = sum(rho) / len(rho), sum(kappa) / len(kappa)
        level = (by_rows + by_columns) / 2
        entries = [[level * (row / by_rows) * (column / by_columns) for column in kappa] for row in rho]
        found = torch.tensor(entries, dtype=torch.float64)
        return found.T if self.recorder._probes[name].layer.transposed else found
