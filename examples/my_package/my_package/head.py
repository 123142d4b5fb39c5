"""A head that looks at a token and at the mean of its image."""

from torch import cat, nn

from radio_distill.models.projectors import HeadShape, Projector


class MyHead(Projector):
    """A linear layer over a token and the mean of all."""

    reads_map = True  # so it is none for a summary, whose token is alone

    def __init__(self, shape: HeadShape, *, bias: bool = True):
        super().__init__()
        self.final = nn.Sequential(nn.Linear(2 * shape.in_features, shape.out_features, bias))

    def forward(self, tokens, grid=(0, 0), inner=()):  # [B, N, D]
        mean = tokens.mean(1, keepdim=True).expand_as(tokens)
        return self.final(cat((tokens, mean), dim=-1))
