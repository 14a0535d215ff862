"""Reinforcement learning from rewards: rollouts, scores, advantages, and the step of stage ppo."""
