"""A network that follows another one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tag2mask.core import TrainingOnly, inference_state
from tag2mask.ops.teacher import Teacher


class Memory(TrainingOnly):
    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.zeros(0, 3))


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 4)
        self.tied = self.head
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)
        self.memory = Memory()

    def forward(self, x):
        return self.tied(self.body(x))


def pair(momentum=0.9):
    torch.manual_seed(0)
    student = Student()
    return student, Teacher(student, momentum=momentum)


def step(student):
    """What a training step changes: weights, and the statistics of norms."""
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    student.train()(torch.randn(8, 3))


def test_it_starts_as_a_copy_that_shares_nothing():
    student, teacher = pair()
    for name, p in teacher.model.named_parameters():
        original = student.get_parameter(name)
        assert torch.equal(p, original) and p.data_ptr() != original.data_ptr() and not p.requires_grad
    step(student)
    assert not torch.equal(teacher.model.head.weight, student.head.weight)
    assert teacher.model.tied is teacher.model.head and student.head.weight.requires_grad


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.997])
def test_weights_are_moving_averages_and_buffers_are_copied(momentum):
    student, teacher = pair(momentum)
    expected = {name: p.detach().double() for name, p in student.named_parameters()}
    for _ in range(5):
        step(student)
        teacher.follow(student)
        for name, p in student.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * p.detach().double()
    for name, p in teacher.model.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], atol=1e-6, rtol=1e-6)
    assert torch.equal(teacher.model.fixed, student.fixed)
    norm = teacher.model.body[1]
    assert norm.num_batches_tracked == 5 and torch.equal(norm.running_var, student.body[1].running_var)
    if momentum == 0:
        assert all(torch.equal(p, student.get_parameter(name)) for name, p in teacher.model.named_parameters())


def test_it_stays_in_evaluation_mode():
    student, teacher = pair()
    model = nn.ModuleDict({"student": student, "teacher": teacher}).train()
    assert student.training and model.training
    assert not any(part.training for part in teacher.modules())
    x = torch.randn(4, 3)
    assert torch.equal(teacher.model(x), teacher.model(x)) and teacher.model.body[1].num_batches_tracked == 0


def test_it_is_in_checkpoints_and_not_in_exported_weights():
    student, teacher = pair()
    whole = nn.ModuleDict({"student": student, "teacher": teacher})
    assert "teacher.model.head.weight" in whole.state_dict()
    assert not any(name.startswith("teacher") for name in inference_state(whole))


def test_what_the_original_keeps_for_its_training_is_not_copied_and_may_change():
    student, teacher = pair()
    assert isinstance(teacher.model.memory, TrainingOnly) and not list(teacher.model.memory.buffers())
    student.memory.rows = torch.ones(7, 3)
    teacher.follow(student)
    assert "model.memory.rows" not in teacher.state_dict() and student.memory.rows.shape == (7, 3)
