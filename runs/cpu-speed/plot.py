"""Three curves of `run.sh` as SVG: milliseconds for 1,000 tokens, stacked by family of ops, over context, routed experts
and batch. Standard library only. Usage: plot.py OUTPUT.jsonl DIRECTORY"""

import sys
from html import escape
from pathlib import Path

from records import ORDER, families, read

WIDTH, HEIGHT = 780, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 205, 56, 64
# Told apart in shades of grey and by the colour-blind, too.
COLOURS = ["#1f4e79", "#4a90c2", "#e0a030", "#b5502e", "#7a6fa5", "#c3c7cc"]


def curves(rows):
    """(file, title, name of the axis, [(x, row)]) of each curve."""
    plain = [r for r in rows if not set(r["keys"]) - {"max_position_embeddings"}]
    context = [(r["seq"], r) for r in plain if r["batch"] * r["seq"] == 4096]
    experts = [(int(r["keys"]["n_routed_experts"]), r) for r in rows if "n_routed_experts" in r["keys"]]
    batch = [(r["batch"], r) for r in plain if r["seq"] == 512 and not r["keys"]]
    name = rows[0]["preset"]
    return [
        ("cpu-context", f"{name}, 4,096 tokens a step, by context", "tokens a sequence", context),
        ("cpu-experts", f"{name}, 8 x 512 tokens a step, by experts", "routed experts, of which 4 are chosen", experts),
        ("cpu-batch", f"{name}, sequences of 512 tokens, by batch", "sequences a step", batch),
    ]


def ceiling(most):
    """(end of the axis, distance of its marks): a round distance, four to eight of them."""
    step = next(m * 10**e for e in range(-2, 7) for m in (1, 2, 5) if most / (m * 10**e) <= 7)
    return step * (int(most / step) + 1), step


def text(x, y, what, anchor="middle", size=13, more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{more}>{escape(what)}</text>'


def draw(title, axis, points):
    points = sorted(points, key=lambda p: p[0])
    stacks = [families(row) for _, row in points]
    totals = [sum(stack.values()) for stack in stacks]
    end, mark = ceiling(max(totals))
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    # Each point has twice the x of the one before: they stand at equal distances.
    at = [LEFT + 30 + (right - LEFT - 60) * i / max(len(points) - 1, 1) for i in range(len(points))]

    def up(ms):
        return floor - (floor - TOP) * ms / end

    out = [text(LEFT, 26, title, "start", 16, ' font-weight="bold"')]
    for i in range(round(end / mark) + 1):
        y = up(i * mark)
        out.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        out.append(text(LEFT - 8, y + 4, f"{i * mark:,.10g}", "end"))
    below = [0.0] * len(points)
    areas = []
    for family, colour in zip(ORDER, COLOURS, strict=True):
        above = [b + stack[family] for b, stack in zip(below, stacks)]
        line = [(x, up(y)) for x, y in zip(at, above)] + [(x, up(y)) for x, y in zip(at[::-1], below[::-1])]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        areas.append(f'<polygon points="{corners}" fill="{colour}" stroke="#ffffff" stroke-width="0.8"/>')
        below = above
    out += areas
    out += legend(right + 18, stacks[-1], f"{points[-1][0]:,}")
    corners = " ".join(f"{x:.1f},{up(y):.1f}" for x, y in zip(at, totals))
    out.append(f'<polyline points="{corners}" fill="none" stroke="#111111" stroke-width="1.8"/>')
    for x, (value, row), total in zip(at, points, totals):
        out.append(f'<circle cx="{x:.1f}" cy="{up(total):.1f}" r="3.5" fill="#111111"/>')
        # Over a white rim, since the line may pass behind it.
        rim = ' stroke="#ffffff" stroke-width="3" paint-order="stroke"'
        out.append(text(x, up(total) - 10, f"{total:,.0f} ms", size=12, more=rim))
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 5}" stroke="#111111"/>')
        out.append(text(x, floor + 20, f"{value:,}"))
        out.append(text(x, floor + 36, f"{row['ours']:,.0f} tokens/s", size=11, more=' fill="#555555"'))
    out.append(f'<path d="M{LEFT} {TOP}V{floor}H{right}" fill="none" stroke="#111111"/>')
    out.append(text((LEFT + right) / 2, HEIGHT - 8, axis))
    middle = (TOP + floor) / 2
    out.append(text(18, middle, "milliseconds for 1,000 tokens", more=f' transform="rotate(-90 18 {middle})"'))
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *out,
        "</svg>\n",
    ])


def legend(x, stack, last):
    """Families from the top down, as they are stacked, with their parts at the last point."""
    out = [text(x, TOP + 4, f"ms at {last}", "start", 12, ' fill="#555555"')]
    for i, (family, colour) in enumerate(reversed(list(zip(ORDER, COLOURS)))):
        y = TOP + 16 + 24 * i
        out.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{colour}"/>')
        out.append(text(x + 20, y + 12, f"{family}: {stack[family]:.0f}", "start", 12))
    return out


def main(path, directory):
    _, rows = read(path)
    for name, title, axis, points in curves(rows):
        if len(points) < 2:
            raise SystemExit(f"{path}: expected at least two points of {name}, found {len(points)}")
        (Path(directory) / f"{name}.svg").write_text(draw(title, axis, points), encoding="utf-8")


main(*sys.argv[1:])
