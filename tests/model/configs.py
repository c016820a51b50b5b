"""Configurations as MMDetection 3.x and 2.x store them, of `tiny` with three classes."""

NAMES = ("cell", "dot", "ring")
CONFIG_3X = """
default_scope = 'mmdet'
model = dict(type='TOOD', init_cfg=None, train_cfg=dict(alpha=1),
    backbone=dict(type='ResNet', depth=18, base_channels=32, num_stages=4, frozen_stages=1,
        out_indices=(0, 1, 2, 3), norm_cfg=dict(type='BN', requires_grad=True), norm_eval=True,
        style='pytorch'),
    neck=dict(type='FPN', in_channels=[32, 64, 128, 256], out_channels=64, start_level=1,
        add_extra_convs='on_output', num_outs=5),
    bbox_head=dict(type='TOODHead', num_classes=3, in_channels=64, feat_channels=64,
        stacked_convs=6, anchor_type='anchor_free',
        anchor_generator=dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8,
            scales_per_octave=1, strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[.0, .0, .0, .0],
            target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True)),
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32),
    test_cfg=dict(nms_pre=1000, min_bbox_size=0, score_thr=0.05,
        nms=dict(type='nms', iou_threshold=0.6), max_per_img=100))
train_cfg = dict(max_epochs=12)
test_cfg = dict(type='TestLoop')
test_dataloader = dict(dataset=dict(type='CocoDataset', pipeline=[
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='Resize', scale=(320, 240), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')]))
unsafe = __import__('os').system('touch executed')
"""
CONFIG_2X = """
model = dict(type='TOOD', bbox_head=dict(type='TOODHead', anchor_type='anchor_free'))
test_cfg = dict(nms_pre=500, score_thr=0.1, nms=dict(type='nms', iou_thr=0.5), max_per_img=50)
data = dict(test=dict(type='CocoDataset', pipeline=[dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(320, 240), flip=False, transforms=[
        dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'),
        dict(type='Normalize', mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375], to_rgb=True),
        dict(type='Pad', size_divisor=32), dict(type='ImageToTensor', keys=['img']),
        dict(type='Collect', keys=['img'])])]))
runner = dict(type='EpochBasedRunner', max_epochs=24)
"""
