"""ALP-GMM teaching gymnasium's BipedalWalker to cross stumps, for minutes where the paper takes days.

A task is a flat course with stumps of one height, at one distance from each other, as in the paper's stump track. From
about 0.4 m on nobody here has learned to cross them, so most of the box is out of reach. The paper's learner is SAC,
for 20 million steps. Here it is one that learns something in 2,000 tasks: it walks by gymnasium's hand-written gait and
learns 13 numbers of how the gait sees the walker's state. For a task it takes the numbers that did best nearby, tries
them and changed ones on the same course, and remembers both rewards. The learner's two settings (how far numbers are
changed, how many memories are near) were chosen from four pairs under uniform tasks, at a seed that is not run here.
"""

from __future__ import annotations

import numpy as np

from mixtura.core.errors import MixturaError
from mixtura.density import ALPGMM
from mixtura.evidence import Lab, Verdict, evidence

PIECES, PIECE = 90, 14 / 30  # of the ground, and how long one is
GROUND, FIRST = 400 / 30 / 4, 20 * PIECE  # height of the ground, and where the first stump stands
END = (PIECES - 4) * PIECE
STEPS, STUCK = 600, 80  # most of them, and most without getting further
LOW, SPACING = (0.0, 0.5), 6.0  # stumps of no height, half a meter from each other; and the largest distance
NUMBERS, CHANGE, NEAR = 13, 0.3, 24


class Course:
    """gymnasium's walker on a flat course with stumps."""

    def __init__(self):
        try:
            from gymnasium.envs.box2d.bipedal_walker import BipedalWalker
        except ImportError:
            raise MixturaError('the walker needs gymnasium: pip install "gymnasium[box2d]"') from None
        self.env = BipedalWalker()
        self.env._generate_terrain = self.build

    def build(self, hardcore):
        env, x = self.env, FIRST
        env.terrain, env.terrain_poly, env.terrain_y = [], [], [GROUND] * PIECES
        env.terrain_x = [n * PIECE for n in range(PIECES)]
        while x < END and self.height > 0:
            corners = [(0, 0), (PIECE, 0), (PIECE, self.height), (0, self.height)]
            env.fd_polygon.shape.vertices = [(x + right, GROUND + up) for right, up in corners]
            env.terrain.append(env.world.CreateStaticBody(fixtures=env.fd_polygon))
            x += PIECE + self.spacing
        for left in env.terrain_x[:-1]:
            env.fd_edge.shape.vertices = [(left, GROUND), (left + PIECE, GROUND)]
            env.terrain.append(env.world.CreateStaticBody(fixtures=env.fd_edge))
        for body in env.terrain:
            body.color1 = body.color2 = (76, 204, 76)

    def walk(self, task, numbers, push):
        """Share of the course that is walked before it falls, is stuck or has no time left; 0 where it starts."""
        self.height, self.spacing = task
        state, _ = self.env.reset(seed=push)
        gait, start = Gait(numbers), self.env.hull.position[0]
        furthest = steps = since = 0
        fallen = False
        while not fallen and furthest < END and steps < STEPS and since < STUCK:
            state, _, fallen, _, _ = self.env.step(gait(state))
            x, steps = self.env.hull.position[0], steps + 1
            furthest, since = (x, 0) if x > furthest + 0.05 else (furthest, since + 1)
        return (min(x, END) - start) / (END - start)


class Gait:
    """gymnasium's hand-written gait, which sees each value of the state by a scale and an offset.

    Args:
        numbers: logarithms of the scales of the hull's angle, its spin, its two speeds and the angle and speed of hips
            and of knees; offsets of hull, forward speed, hip and knee; and how far the knee that carries bends. 0 is
            the gait as it is.
    """

    def __init__(self, numbers):
        from gymnasium.envs.box2d.bipedal_walker import BipedalWalkerHeuristics

        self.gait = BipedalWalkerHeuristics()
        self.gait.SUPPORT_KNEE_ANGLE = self.gait.supporting_knee_angle = 0.1 + 0.1 * numbers[12]
        self.scale, self.offset = np.ones(14), np.zeros(14)
        self.scale[:8] = np.exp(0.4 * numbers[:8])
        self.offset[[0, 2, 4, 6]] = numbers[8:12] * [0.1, 0.1, 0.2, 0.2]
        for values in (self.scale, self.offset):
            values[9:13] = values[4:8]  # both legs see alike

    def __call__(self, state):
        return self.gait.step_heuristic((self.scale * state[:14] + self.offset).tolist())


class Student:
    """Remembers rewards of (task, numbers); walks by those that were best nearby."""

    def __init__(self, high, seed):
        self.course, self.rng = Course(), np.random.default_rng([seed, 1])
        self.span = np.subtract(high, LOW)
        self.numbers = [np.zeros(NUMBERS)]
        self.tasks, self.rewards, self.used = [], [], []

    def recall(self, task):
        """Index of the numbers with the best mean reward nearby, where one average reward more is counted for each."""
        if not self.tasks:
            return 0
        away = (((np.array(self.tasks) - task) / self.span) ** 2).sum(1)
        near = np.argsort(away)[:NEAR]
        rewards = np.array(self.rewards)[near]
        found, which = np.unique(np.array(self.used)[near], return_inverse=True)
        means = (np.bincount(which, rewards) + rewards.mean()) / (np.bincount(which) + 1)
        return int(found[means.argmax()])

    def practice(self, task):
        """The better reward of the numbers it knows and of changed ones."""
        known, push = self.recall(task), int(self.rng.integers(2**30))
        self.numbers.append(self.numbers[known] + CHANGE * self.rng.normal(size=NUMBERS))
        rewards = []
        for index in (known, len(self.numbers) - 1):
            rewards.append(self.course.walk(task, self.numbers[index], push))
            self.tasks.append(task)
            self.used.append(index)
        self.rewards += rewards
        return max(rewards)

    def examine(self, heights, spacings, pushes):
        """Mean share of the course, of tasks on a grid, by what it knows."""
        tasks = [np.array([height, spacing]) for height in heights for spacing in spacings]
        walked = [self.course.walk(task, self.numbers[self.recall(task)], push) for task in tasks for push in pushes]
        return float(np.mean(walked))


def train(seed: int, teacher: str, highest: float, tasks: int, grid: int) -> dict[str, float]:
    """How far it walks before and after so many tasks."""
    high = (highest, SPACING)
    share = {"alp-gmm": 0.2, "uniform": 1.0}[teacher]
    chosen, student = ALPGMM(LOW, high, random_share=share, random_state=seed), Student(high, seed)
    exam = np.linspace(0.05, 0.55, grid), np.linspace(1, 5.5, grid), range(1, 4)
    before = student.examine(*exam)
    for _ in range(tasks):
        task = chosen.ask()
        chosen.tell(task, student.practice(task))
    low = float((chosen.tasks[:, 0] < 0.4).mean())
    return {"before": before, "walked": student.examine(*exam), "tasks below 0.4 m": low}


@evidence(
    "alp-gmm-walker",
    claim="A teacher that samples tasks by absolute learning progress trains a walker better than uniform tasks, the "
    "more so the more tasks are out of reach",
    source="arXiv:1910.07224",
    figure="share of the course that is walked, mean of 36 courses with stumps up to 0.55 m, higher is better",
    setting="gymnasium's BipedalWalker, stumps up to 1.2 or up to 2.4 m, 0.5 to 6 m apart, 2000 tasks; the learner "
    "tunes 13 numbers of gymnasium's own gait; not SAC",
    seeds=5,
)
def run(lab: Lab) -> Verdict:
    tasks, grid = lab.pick(2_000, smoke=4), lab.pick(6, smoke=1)
    for highest in (1.2, 2.4):
        for teacher in ("alp-gmm", "uniform"):
            name = f"{teacher}, stumps up to {highest} m"
            lab.arm(name, train, teacher=teacher, highest=highest, tasks=tasks, grid=grid)
    gaps = {
        highest: lab.difference("walked", f"alp-gmm, stumps up to {highest} m", f"uniform, stumps up to {highest} m")
        for highest in (1.2, 2.4)
    }
    won = [gap.low > 0 for gap in gaps.values()]
    said = "; ".join(f"with stumps up to {highest} m {gap}" for highest, gap in gaps.items())
    verdict = "holds" if all(won) else "partly" if any(won) else "does not hold here"
    return Verdict(verdict, f"What ALP-GMM adds to the share that is walked: {said}.")
