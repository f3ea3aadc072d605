"""Scales that groups of neighbours in a row share, fitted to numbers that are rounded."""

import torch

from emloc_core.algorithms.statistics import blocks

#: Numbers of a row that share a scale, which is in bf16.
GROUP = 256
#: Numbers of the products of Gram and numbers that are held while scales are fitted, of so many rows at least.
_PRODUCTS, _FEWEST = {"cpu": 1 << 22, "cuda": 1 << 25}, 64


def fitted_scales(
    image: torch.Tensor, units: torch.Tensor, gram: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit scales to rounded numbers by least squares, row by row.

    A row that would need a scale of 0 or less keeps its own.

    Args:
        image: ``G M^T``, (n, m), in fp32.
        units: rounded numbers, (n, m), without their scales.
        gram: G, (n, n), positive definite.
        scales: as they are, (m, groups), bf16.

    Returns:
        The scales, (m, groups), bf16; and ``G (M - Q)^T``, (n, m), for the rounded numbers Q with these.
    """
    (n, m), device = units.shape, gram.device.type
    fitted, descent = torch.empty_like(scales), torch.empty_like(image)
    most = rows_at_once(n, _PRODUCTS.get(device, _PRODUCTS["cuda"]))
    for rows in (slice(start, start + most) for start in range(0, m, most)):
        part_units, old = units[:, rows].contiguous(), scales[rows].double()
        products = [gram[:, part] @ part_units[part] for part in blocks(n, GROUP)]
        curvature = torch.stack([by_group(product * part_units) for product in products]).permute(2, 0, 1).double()
        slope = by_group(part_units * image[:, rows]).T.double() - (curvature @ old[..., None])[..., 0]
        diagonal = curvature.diagonal(dim1=1, dim2=2)  # of a group of zeros, it is 0
        diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + torch.finfo(image.dtype).tiny
        changed = (old + torch.linalg.solve(curvature, slope)).to(scales.dtype)
        usable = ((changed > 0) & changed.isfinite()).all(1, keepdim=True)
        fitted[rows] = torch.where(usable, changed, scales[rows])
        residual = image[:, rows].clone()
        for product, scale in zip(products, fitted[rows].float().T.contiguous(), strict=True):
            residual.addcmul_(product, scale, value=-1)
        descent[:, rows] = residual
        del products
    return fitted, descent


def rows_at_once(n: int, products: int = max(_PRODUCTS.values())) -> int:
    """Return for how many rows of n numbers scales are fitted at a time, with so many products, one per group."""
    return max(_FEWEST, products // (-(-n // GROUP) * n))


def by_group(numbers: torch.Tensor) -> torch.Tensor:
    """Return the sum of every group of a column, (groups, m), for numbers (n, m)."""
    groups, rest = divmod(len(numbers), GROUP)
    sums = numbers[: groups * GROUP].unflatten(0, (groups, GROUP)).sum(1)
    return torch.cat([sums, numbers[-rest:].sum(0, keepdim=True)]) if rest else sums


def spread(scales: torch.Tensor, n: int) -> torch.Tensor:
    """Return the scale of every number, (..., m, n)."""
    return scales.repeat_interleave(GROUP, dim=-1)[..., :n]


def lookup(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return ``values[indices]``, several times as fast on a CPU."""
    return values.index_select(0, indices.flatten().int()).view(*indices.shape, *values.shape[1:])
